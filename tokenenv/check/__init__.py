"""A check of the contract of token envs, which users can run on an env of their own."""

from tokenenv.check.checker import check_vector_env

__all__ = ["check_vector_env"]
