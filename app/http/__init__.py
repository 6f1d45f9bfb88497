"""HTTP/1.1 on top of uvicorn: connections, request heads, and the writing of responses."""
