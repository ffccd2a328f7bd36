"""Noise levels: grids, curricula, levels and weightings. No networks.

Glossary (the same names everywhere):

| symbol in the papers | name | meaning |
|---|---|---|
| sigma, t | `sigma` | [B], standard deviation of the noise; never an index |
| t_1 .. t_N | `sigmas` | [N], increasing for training, decreasing for samplers |
| N(k) | `num_levels` | number of grid points; there are N - 1 gaps |
| i | `n` | [B] int64 in [0, N - 2]; the pair is (sigmas[n], sigmas[n + 1]) |
| t_n, t_{n+1} | `sigma_lo`, `sigma_hi` | [B]; the online network sees `sigma_hi`, the target `sigma_lo` |
| k, K | `k` or `step`, `total_steps` | optimizer steps |
"""
