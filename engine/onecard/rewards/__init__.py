"""Responses -> scores."""
