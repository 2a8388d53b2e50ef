#!/bin/busybox sh
# Runs what the test sends over the second serial port. A command is one line:
# a number, a time limit in seconds, and the command line in base64. The answer
# is "begin NUMBER", the output in base64, "end NUMBER STATUS".
exec </dev/ttyS1 >/dev/ttyS1 2>/dev/console
stty raw -echo
echo
echo ready
while read -r number seconds command; do
    echo "$command" | base64 -d >/tmp/command
    timeout -s KILL "$seconds" sh /tmp/command </dev/null >/tmp/output 2>&1
    status=$?
    echo "begin $number"
    base64 /tmp/output
    echo "end $number $status"
done
