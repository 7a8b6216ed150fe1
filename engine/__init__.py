"""What keeps a run going: processes, options, files, the log, checkpoints and faults."""
