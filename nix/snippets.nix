# The Nix snippets of the documents: [ { name = "docs/nix.md:20"; text; module; } ]. To look at a module is to parse it;
# nix/module-tests.nix evaluates them. Needs no nixpkgs.
let
  root = ../.;
  pages = [
    "README.md"
  ]
  ++ map (name: "docs/${name}") (
    builtins.filter (name: builtins.match ".*\\.md" name != null) (
      builtins.attrNames (builtins.readDir (root + "/docs"))
    )
  );
  # The pieces of a text between literal marks.
  pieces = mark: text: builtins.filter builtins.isString (builtins.split mark text);
  lines = text: builtins.length (pieces "\n" text);
  # A snippet is a whole module, or stands for what is in one. A file beside it is one of the examples.
  module =
    text:
    import (
      builtins.toFile "snippet.nix" (
        builtins.replaceStrings [ "./policy.hujson" ] [ (toString ../examples/policy/laboratory.hujson) ] (
          if builtins.match "[{].*" text != null then
            "{ config, lib, pkgs, lacis, ... }:\n${text}\n"
          else
            "{ config, lib, pkgs, ... }: {\n${text}\n}\n"
        )
      )
    );
  snippetsOf =
    page:
    let
      split = pieces "```nix\n" (builtins.readFile (root + "/${page}"));
      step =
        { found, line }:
        rest:
        let
          text = builtins.head (pieces "\n```" rest);
        in
        {
          line = line + lines rest;
          found = found ++ [
            {
              name = "${page}:${toString line}";
              inherit text;
              module = module text;
            }
          ];
        };
    in
    (builtins.foldl' step {
      found = [ ];
      line = lines (builtins.head split) + 1;
    } (builtins.tail split)).found;
in
builtins.concatLists (map snippetsOf pages)
