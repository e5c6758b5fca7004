"""The deployments: one recipe per target model, and the command line of the flows."""
