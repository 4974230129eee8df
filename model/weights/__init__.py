"""Checkpoints of every form behind one reader: headers first, tensors one at a time.

`checkpoint.open_checkpoint` is the way in. Owns file formats, names and layouts on disk; knows
nothing of the network, of devices or of how a loaded tensor is stored.
"""
