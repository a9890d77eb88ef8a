from truthsteer.cli import main

main()
