"""The ops that are written in Triton; imported only when one is first asked for."""
