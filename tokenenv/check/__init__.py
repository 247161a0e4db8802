"""The contract as a check that users can run on an env of their own."""

from tokenenv.check.checker import check_vector_env

__all__ = ["check_vector_env"]
