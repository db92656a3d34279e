"""Commands for now and then: the care of caches, and what finetuning changed in each layer."""
