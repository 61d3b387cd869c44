"""Router-Tuning (arXiv 2410.13184): train the routers of a dynamic-depth model. Never imports vLLM."""
