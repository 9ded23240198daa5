"""Runs on a cluster: what is submitted, and what keeps it going there."""
