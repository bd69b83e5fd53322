"""Who decides which components act on which row: one file a router; decisions and executors beside them."""
