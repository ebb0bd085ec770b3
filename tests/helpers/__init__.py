"""Helpers that several test files share. Nothing here is a test."""
