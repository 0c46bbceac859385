"""One file a parallel dimension; `apply.py` states their order once."""
