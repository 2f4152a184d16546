# For users without flakes: imports = [ "${lacis}/nixos-modules" ];
{
  imports = [
    ./coordinator.nix
    ./relay.nix
    ./client.nix
  ];
}
