from jointfuse.cli import main

main()
