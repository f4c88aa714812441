"""Sequence parallelism on torch.distributed: several devices, one compiled graph."""
