"""Engines without a server: the Python interface, and files of requests."""
