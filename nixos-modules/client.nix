# services.lacis.client: this machine as a node of a mesh.
{
  config,
  lib,
  pkgs,
  utils,
  ...
}:
let
  cfg = config.services.lacis.client;
  inStore = path: path != null && lib.hasPrefix builtins.storeDir path;
in
{
  options.services.lacis.client = {
    enable = lib.mkEnableOption "the Lacis client";

    package = lib.mkPackageOption pkgs "lacis" { };

    interface = lib.mkOption {
      type = lib.types.strMatching "[^/[:space:]]{1,15}";
      default = "lacis0";
      example = "mesh0";
      description = "Name of the tunnel's network interface.";
    };

    port = lib.mkOption {
      type = lib.types.port;
      default = 41641;
      example = 0;
      description = "UDP port of the tunnel; 0 is the one used last, or any.";
    };

    openFirewall = lib.mkOption {
      type = lib.types.bool;
      default = false;
      example = true;
      description = "Whether to open the tunnel's UDP port. Not needed to be reachable: it only makes direct paths likelier.";
    };

    endpoints = lib.mkOption {
      type = lib.types.listOf (lib.types.strMatching "([0-9.]+|\\[[0-9a-fA-F:]+]):[0-9]+");
      default = [ ];
      example = [
        "198.51.100.7:41641"
        "[2001:db8::7]:41641"
      ];
      description = "Addresses at which peers can reach this node, such as a port that a router forwards. The others are found out.";
    };

    portMapping = lib.mkOption {
      type = lib.types.bool;
      default = true;
      example = false;
      description = "Whether to ask the router to map the tunnel's UDP port (UPnP, NAT-PMP, PCP).";
    };

    portSearch = lib.mkOption {
      type = lib.types.bool;
      default = true;
      example = false;
      description = ''
        Whether to search for the ports of NATs that use another one for every destination: some hundred small packets each
        time. Networks that NetworkManager calls metered turn it off by themselves; on others that are, turn it off here.
      '';
    };

    trustInterface = lib.mkOption {
      type = lib.types.bool;
      default = false;
      example = true;
      description = ''
        Whether the host's firewall accepts everything that comes in by the mesh.
        The network's own rules hold in either case.
      '';
    };

    loginServer = lib.mkOption {
      type = lib.types.nullOr (lib.types.strMatching "https?://.+");
      default = null;
      example = "https://mesh.example.org";
      description = "URL of the coordinator. With {option}`authKeyFile` the machine joins by itself.";
    };

    authKeyFile = lib.mkOption {
      type = lib.types.nullOr lib.types.str;
      default = null;
      example = "/run/secrets/lacis-auth-key";
      description = "File with a pre-auth key, outside the Nix store. systemd hands it to the unit that signs in.";
    };

    hostname = lib.mkOption {
      type = lib.types.nullOr lib.types.nonEmptyStr;
      default = null;
      example = "bob";
      description = "Name of the node, if it is to differ from the machine's.";
    };

    acceptDns = lib.mkOption {
      type = lib.types.bool;
      default = true;
      example = false;
      description = "Whether names of the mesh resolve on this machine.";
    };
  };

  config = lib.mkIf cfg.enable {
    assertions = [
      {
        assertion = (cfg.loginServer == null) == (cfg.authKeyFile == null);
        message = "services.lacis.client: loginServer and authKeyFile go together; set both, or neither and sign in with `lacis up`.";
      }
      {
        assertion = !inStore cfg.authKeyFile;
        message = "services.lacis.client.authKeyFile is in the world-readable Nix store: give a path outside it.";
      }
    ];

    environment.systemPackages = [ cfg.package ];
    boot.kernelModules = [ "tun" ];

    # The unit comes with the package; only what depends on the options is added here.
    systemd.packages = [ cfg.package ];
    systemd.services.lacisd = {
      wantedBy = [ "multi-user.target" ];
      # One restart at the end of a switch, so that a deployment through the tunnel goes on.
      stopIfChanged = false;
      path = [
        pkgs.nftables
      ]
      ++ lib.optional config.networking.resolvconf.enable config.networking.resolvconf.package;
      serviceConfig.ExecStart = [
        ""
        (utils.escapeSystemdExecArgs (
          [
            (lib.getExe' cfg.package "lacisd")
            "--state-dir"
            "/var/lib/lacis"
            "--socket"
            "/run/lacis/lacisd.sock"
            "--tun"
            cfg.interface
            "--port"
            (toString cfg.port)
            "--port-mapping"
            (lib.boolToString cfg.portMapping)
            "--port-search"
            (lib.boolToString cfg.portSearch)
          ]
          ++ lib.concatMap (endpoint: [
            "--endpoint"
            endpoint
          ]) cfg.endpoints
        ))
      ];
    };

    # Signs in once; while the coordinator is away it tries again and holds nothing up (Type=exec).
    systemd.services.lacis-up = lib.mkIf (cfg.loginServer != null) {
      description = "Sign in to the mesh";
      wantedBy = [ "multi-user.target" ];
      after = [ "lacisd.service" ];
      requires = [ "lacisd.service" ];
      unitConfig.StartLimitIntervalSec = 0;
      serviceConfig = {
        Type = "exec";
        RemainAfterExit = true;
        Restart = "on-failure";
        RestartSec = "5s";
        LoadCredential = [ "auth-key:${cfg.authKeyFile}" ];
        ExecStart = lib.concatStringsSep " " (
          [
            (utils.escapeSystemdExecArgs (
              [
                (lib.getExe' cfg.package "lacis")
                "up"
                "--reset"
                "--login-server"
                cfg.loginServer
                "--accept-dns=${lib.boolToString cfg.acceptDns}"
                "--timeout"
                "30s"
              ]
              ++ lib.optionals (cfg.hostname != null) [
                "--hostname"
                cfg.hostname
              ]
            ))
          ]
          ++ [ "--auth-key=file:%d/auth-key" ]
        );
      };
    };

    networking.firewall = {
      allowedUDPPorts = lib.mkIf (cfg.openFirewall && cfg.port != 0) [ cfg.port ];
      trustedInterfaces = lib.mkIf cfg.trustInterface [ cfg.interface ];
    };

    # Nobody else configures the interface.
    networking.dhcpcd.denyInterfaces = [ cfg.interface ];
    networking.networkmanager.unmanaged = [ "interface-name:${cfg.interface}" ];
    systemd.network.networks."50-lacis" = lib.mkIf config.networking.useNetworkd {
      matchConfig.Name = cfg.interface;
      linkConfig = {
        Unmanaged = true;
        ActivationPolicy = "manual";
      };
    };
    systemd.network.wait-online.ignoredInterfaces = [ cfg.interface ];
  };
}
