"""The base, its adapters and heads as roles, and the door through which records reach them."""
