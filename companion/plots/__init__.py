"""The chapters' figures and tables."""
