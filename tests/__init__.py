"""Tests mirror src/transmamba: the test of ops/ssd_scan is tests/ops/test_ssd_scan.py."""
