"""What several tests (and the demo) share: tiny models, a real server, Model Runner V2 on the CPU."""
