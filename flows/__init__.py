"""The recipe, the plan, the command line and the Prefect flows: the only package that knows Prefect."""
