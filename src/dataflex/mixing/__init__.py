"""Proportions of domains from small runs, proxies or embeddings, before the large run: what ``dataflex mix`` does."""
