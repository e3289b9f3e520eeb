"""Make S3 buckets that are missing: `python make_buckets.py NAME...`; endpoint and keys are boto3's own settings."""

from __future__ import annotations

import sys

import boto3


def main(names: list[str]) -> None:
    client = boto3.client("s3")
    there = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    for name in names:
        if name not in there:
            client.create_bucket(Bucket=name)
        print(f"bucket {name} {'was there' if name in there else 'made'}")


if __name__ == "__main__":
    main(sys.argv[1:])
