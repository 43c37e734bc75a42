"""Training on a pipeline: which schedule, which layers where, and what an update does where no process has it all."""
