"""``lowmem plan``: what a training step of a model of real size takes, found without its weights and without a GPU."""
