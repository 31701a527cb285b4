from fieldguide.cli.commands import main

main()
