"""JAX as jax_jit.py, data-parallel over two devices in one process, which is how JAX takes two cores."""

from jax_jit import main

if __name__ == "__main__":
    main(devices=2)
