"""Which way is up: a source and a rotation network -> the turn that puts each image upright, or that none is known."""
