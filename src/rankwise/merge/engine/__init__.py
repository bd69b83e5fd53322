"""What every merge stands on: stacks of sources, folders of adapters and models, jobs that write."""
