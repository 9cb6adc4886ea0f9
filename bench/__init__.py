"""What the engine costs and how fast it is: `pytest bench`, `python -m bench.report`, `.compare`, `.gpu`."""
