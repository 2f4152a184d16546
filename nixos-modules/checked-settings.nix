# The configuration file of a program, checked by itself when the system is built: a bad declaration fails there, with
# the path and the nearest known key.
{ lib, pkgs }:
program: cfg:
let
  file = (pkgs.formats.json { }).generate "${program}.json" (
    lib.filterAttrsRecursive (_: value: value != null) cfg.settings
  );
in
if cfg.validate && pkgs.stdenv.buildPlatform.canExecute pkgs.stdenv.hostPlatform then
  pkgs.runCommand "${program}-checked.json" { nativeBuildInputs = [ cfg.package ]; } ''
    ${program} check --config ${file}
    cp ${file} $out
  ''
else
  file
