"""Bundles as other servers want them."""
