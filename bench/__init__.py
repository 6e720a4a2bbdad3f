"""Measure ENG beside what it is compared with, in one run, on hosts made of network namespaces."""
