"""Answers to requests over HTTP: an engine that shares rows among requests, the rules of a request, and the pages."""
