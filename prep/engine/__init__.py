"""Run work units: in this process or in several."""
