"""Eight virtual CPU devices for every test; types and ranks must match where the library's own code runs."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
