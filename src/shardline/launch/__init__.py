"""Starting the processes of a job: ``run`` in the launcher, ``runner`` in each rank."""
