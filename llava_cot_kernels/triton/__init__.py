"""The ops that are written in Triton. A module is imported when one of its ops is first used."""
