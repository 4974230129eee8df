"""The wire: what requests may say, as pydantic types. Nothing else."""
