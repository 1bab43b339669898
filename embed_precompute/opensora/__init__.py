"""For whoever runs Open-Sora v2: its data set class over our shards, and an export."""
