#!/usr/bin/env bash
# Gets Apache Kafka from Maven Central into a directory, for tests: its libraries, of which `java -cp 'DIR/libs/*'` starts a broker.
#
#   scripts/servers-kafka.sh DIR [VERSION]
#
# Prints the directory. Does nothing if it is there already. Needs mvn; running it needs Java 17.
set -euo pipefail

dir=${1:?the directory to put it into} version=${2:-3.9.1}
if [[ ! -e "$dir/libs/kafka_2.13-$version.jar" ]]; then
  command -v mvn >/dev/null || { echo "$0: mvn is needed" >&2; exit 1; }
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  cat >"$work/pom.xml" <<POM
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>nkv.tests</groupId>
  <artifactId>kafka</artifactId>
  <version>1</version>
  <packaging>pom</packaging>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId>
      <artifactId>kafka_2.13</artifactId>
      <version>$version</version>
    </dependency>
  </dependencies>
</project>
POM
  mvn -B -q -f "$work/pom.xml" dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory="$work/libs" >&2
  mkdir -p "$dir"
  rm -rf "$dir/libs"
  mv "$work/libs" "$dir/libs"
fi
cd "$dir" && pwd
