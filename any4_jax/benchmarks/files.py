"""Files of results and drawings, by the functions that write files as a whole."""

from any4_jax.whole_file import check_target, write_whole

__all__ = ["check_target", "write_whole"]
