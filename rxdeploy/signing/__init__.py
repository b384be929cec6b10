"""Signed bundles: who made every byte of one; see docs/security.md.

Signing is the OpenSSF model-signing library's (the extra `sign`), and what it writes any tool of that kind can check.
A serving host checks it with `cryptography` alone (the extra `verify`): see signature.py.
"""
