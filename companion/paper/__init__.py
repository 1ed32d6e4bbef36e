"""The paper's numbers as typed data."""
