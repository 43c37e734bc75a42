"""Which layers make a stage, and on how many devices it runs, from counted FLOPs or a profile of the layers."""
