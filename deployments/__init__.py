"""What runs where and when: one YAML per target model, and the front doors to the flows."""
