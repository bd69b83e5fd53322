"""Extra terms beside the task's loss: regularisers, distillation. One file a method."""
