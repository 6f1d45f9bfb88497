"""`python -m app` is the program `embedding-gateway`."""

from app.cli import main

main()
