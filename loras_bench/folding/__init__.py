"""Folded attention: query and key matrices of identical rows, a diagonal value matrix, and real modules of that size.

After the abstract of Belhaouari and Kraidia 2025 (Sci. Rep. 15:10171, doi 10.1038/s41598-025-92586-5), which names the
two compressions and what they save; the equations, the initialisations and the fits are ours (docs/methods.md).
"""
